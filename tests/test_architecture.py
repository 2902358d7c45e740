"""Every import points the way the design says, and the README names every file.

    errors <- storage, images <- coco, model, evaluate <- train, bulk, serve <- benchmark <- cli <- jobs

`train`, `bulk` and `serve` know nothing of each other; `benchmark` measures what they do, and is known to `cli` alone.
Ray is known in `on_ray.py` files alone, S3 clients in `storage`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

import pytest

import raycap

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("raycap", "jobs")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
ROOMS = ("raycap.train", "raycap.bulk", "raycap.serve")
TORCH_FREE = [
    "raycap",
    "raycap.errors",
    "raycap.storage",
    "raycap.images",
    "raycap.readahead",
    "raycap.ensemble.config",
    "raycap.train.config",
    "raycap.train.pixels",
    "raycap.train.resources",
    "raycap.bulk.config",
    "raycap.bulk.manifest",
    "raycap.bulk.rows",
    "raycap.bulk.commit",
    "raycap.bulk.report",
    "raycap.bulk.sources",
    "raycap.bulk.listing",
    "raycap.bulk.export",
    "raycap.bulk.status",
    "raycap.benchmark.config",
    "raycap.serve.api",
    "raycap.serve.client",
    "raycap.serve.config",
    "raycap.evaluate.config",
    "raycap.evaluate.run",
    "raycap.cli",
]


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def nodes_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, inside functions too, but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if not is_type_checking(node):
            yield node
            yield from nodes_at_run_time(node)


@cache
def imports_of(name: str, *, run_time_only: bool = False) -> frozenset[str]:
    """Everything that a module imports, wherever in it: modules, and names in modules."""
    tree = tree_of(name)
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in nodes_at_run_time(tree) if run_time_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            assert module is not None
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(importers: list[str], *forbidden: str) -> list[str]:
    return [
        f"{name} imports {imported}"
        for name in importers
        for imported in sorted(imports_of(name))
        if is_in(imported, *forbidden)
    ]


def inside(*packages: str) -> list[str]:
    return [name for name in MODULES if is_in(name, *packages)]


def outside(*packages: str) -> list[str]:
    return [name for name in MODULES if not is_in(name, *packages)]


def test_the_parser_sees_imports() -> None:
    assert {"raycap.errors", "raycap.errors.RaycapError", "tyro"} <= imports_of("raycap.cli")
    assert "raycap.bulk.run.caption" in imports_of("raycap.cli")  # inside a function
    assert "raycap.model.captioner.Captioner" in imports_of("raycap.bulk.rows")
    assert "raycap.model.captioner.Captioner" not in imports_of("raycap.bulk.rows", run_time_only=True)


def test_errors_import_nothing_of_ours() -> None:
    assert offences(["raycap.errors"], "raycap", "jobs") == []


def test_what_is_shared_knows_nothing_of_the_jobs() -> None:
    shared = (
        "raycap.errors",
        "raycap.storage",
        "raycap.images",
        "raycap.coco",
        "raycap.model",
        "raycap.evaluate",
        "raycap.readahead",
        "raycap.html",
        "raycap.ensemble",
    )
    assert offences(inside(*shared), *ROOMS) == []


def test_storage_and_images_know_nothing_of_the_model() -> None:
    assert offences(inside("raycap.storage", "raycap.images"), "raycap.model", "raycap.evaluate", "raycap.coco") == []
    assert offences(inside("raycap.storage"), "raycap.images") == []
    assert offences(inside("raycap.model"), "raycap.evaluate", "raycap.coco") == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_three_jobs_do_not_know_each_other(room: str) -> None:
    assert offences(inside(room), *(other for other in ROOMS if other != room)) == []


def test_nothing_imports_the_entry_points() -> None:
    importers = [name for name in outside("jobs") if name != "raycap.__main__"]
    assert offences(importers, "raycap.cli", "jobs") == []


def test_nothing_but_the_command_line_imports_the_benchmark() -> None:
    assert offences(outside("raycap.benchmark", "raycap.cli"), "raycap.benchmark") == []


def test_ray_is_known_in_its_doors_alone() -> None:
    importers = [name for name in outside("jobs") if not name.endswith(".on_ray")]
    assert offences(importers, "ray") == []


def test_doors_to_ray_are_opened_by_the_command_line_and_each_other_alone() -> None:
    doors = [name for name in MODULES if name.endswith(".on_ray")]
    importers = outside(
        "jobs", "raycap.cli", "raycap.bulk.run", "raycap.benchmark.bulk", "raycap.benchmark.serve", *doors
    )
    assert offences(importers, *doors) == []


def test_s3_clients_are_known_in_storage_alone() -> None:
    assert offences(outside("raycap.storage"), "boto3", "botocore", "pyarrow.fs.S3FileSystem", "s3fs", "fsspec") == []


def test_model_and_storage_know_nothing_of_the_command_line() -> None:
    assert offences(inside("raycap.model", "raycap.storage", "raycap.errors", "raycap.images"), "tyro", "rich") == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_imports_neither_torch_nor_ray(name: str) -> None:
    code = f"import {name}, sys; print(*{{'torch', 'ray', 'timm', 'boto3'}} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


def test_workers_that_only_fetch_do_not_load_torch() -> None:
    code = "import raycap.bulk.on_ray, sys; print(*{'torch', 'timm'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (result.returncode, result.stdout.strip()) == (0, "")


def test_every_module_says_what_it_is() -> None:
    silent = [name for name in MODULES if tree_of(name).body and not ast.get_docstring(tree_of(name))]
    assert silent == []


def test_the_library_does_not_print() -> None:
    def prints(name: str) -> bool:
        return any(
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            for node in ast.walk(tree_of(name))
        )

    assert [name for name in MODULES if prints(name)] == []


def test_public_names_exist() -> None:
    assert sorted(raycap.__all__) == list(raycap.__all__)
    for name in raycap.__all__:
        assert getattr(raycap, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        raycap.nonsense  # noqa: B018


# README


def readme_tree() -> dict[str, str]:
    """Path -> description, of the tree in README.md: an indented or fenced block that begins with `raycap/`.

    Two spaces a level; an entry ends in `/` if it is a folder; several files may share a line.
    """
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(r"\s*raycap/(\s|$)", line))
    margin = len(lines[start]) - len(lines[start].lstrip())
    folders: list[tuple[int, str]] = []
    found: dict[str, str] = {}
    for line in lines[start:]:
        depth = len(line) - len(line.lstrip()) - margin
        if not line.strip() or line.strip().startswith("```") or depth < 0:
            break
        folders = [folder for folder in folders if folder[0] < depth]
        parent = folders[-1][1] if folders else ""
        words = line.split()
        names = [word for number, word in enumerate(words) if all(map(is_entry, words[: number + 1]))]
        assert names, f"no file or folder: {line!r}"
        for name in names:
            found[parent + name] = " ".join(words[len(names) :])
        if names[0].endswith("/"):
            folders.append((depth, parent + names[0]))
    return found


def is_entry(word: str) -> bool:
    return re.fullmatch(r"[\w.-]+/|[\w-]+(\.[\w-]+)*\.(py|j2|md|toml|html|json|css|js|yaml)", word) is not None


def test_readme_names_every_module() -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES.values()
        if path.name != "__init__.py" or path.stat().st_size
    }
    assert expected - readme_tree().keys() == set()


def test_files_that_the_readme_names_exist() -> None:
    named = [path for path in readme_tree() if not path.endswith("/")]
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_readme_says_what_each_module_is() -> None:
    silent = [
        path
        for path, text in readme_tree().items()
        if path.startswith("raycap/") and not path.endswith("/") and not text
    ]
    assert silent == []
