"""The shape of the library: what it exports, what imports what, and that documents keep up."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import asyncds

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "asyncds"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Each layer may import those before it, by whatever way, and neither those after it nor its neighbours.
LAYERS = [
    {"errors"},
    {"settings"},
    {"manifest"},
    {"entry", "retry", "stats"},
    {"cache", "store"},
    {"fetcher"},
    {"source"},
    {"dataset"},
]
PLACES = {name: place for place, names in enumerate(LAYERS) for name in names}
# Constructors of a table, which users look for on its class: imported when one is called, from above.
DEFERRED = {"manifest": {"asyncds.origins", "asyncds.parquet"}}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def files(module: str) -> list[Path]:
    path = PACKAGE / module
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@cache
def imported_by(module: str) -> frozenset[str]:
    """The modules of asyncds that a module or package imports, at its top or later, but not for type checkers only."""
    found: set[str] = set()
    nodes: list[ast.AST] = [tree(path) for path in files(module)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            found |= {str(node.module)} - DEFERRED.get(module, set())
        nodes += ast.iter_child_nodes(node)
    return frozenset(name.split(".")[1] for name in found if name.startswith("asyncds.")) - {module}


def reached_from(module: str) -> set[str]:
    reached: set[str] = set()
    ahead = set(imported_by(module))
    while ahead:
        reached |= ahead
        ahead = set().union(*map(imported_by, ahead)) - reached
    return reached


def exported(path: Path) -> list[str]:
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def bound(path: Path) -> set[str]:
    """The names that a module defines or imports at its top."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif hasattr(node, "name"):
            names.add(node.name)
    return names


# names


def test_names_for_users_are_few_and_sorted():
    assert asyncds.__all__ == sorted(asyncds.__all__)
    assert len(set(asyncds.__all__)) == len(asyncds.__all__) < 25
    assert "CachedS3MapDataset" in asyncds.__all__


@pytest.mark.parametrize("name", asyncds.__all__)
def test_name_for_users_resolves_to_what_its_module_exports(name):
    value = getattr(asyncds, name)
    assert value.__name__ == name
    assert name in importlib.import_module(value.__module__).__all__
    assert name in dir(asyncds)


def test_names_for_users_are_known_to_type_checkers():
    checks = [node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If)]
    (block,) = (node for node in checks if ast.unparse(node.test) == "TYPE_CHECKING")
    assert sorted(alias.name for node in block.body for alias in node.names) == asyncds.__all__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = asyncds.NoSuchName


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_says_what_it_is_for_and_exports_what_it_has(path):
    names = exported(path)
    assert sorted(set(names)) == sorted(names)
    assert set(names) <= bound(path) or path in (PACKAGE / "__init__.py", PACKAGE / "testing" / "__init__.py")
    assert ast.get_docstring(tree(path)) or path.name == "__main__.py"
    private = path.parent.name == "testing" and path.name != "__init__.py"
    assert names or private or path.name == "__main__.py"


def test_no_module_is_a_drawer():
    assert not {path.stem for path in SOURCES} & {"utils", "common", "types", "constants", "helpers"}


# docstrings


def documented() -> list[tuple[str, object]]:
    """Everything public that users meet: the names, and the public methods and properties of their classes."""
    found: list[tuple[str, object]] = []
    for name in asyncds.__all__:
        value = getattr(asyncds, name)
        found.append((name, value))
        if inspect.isclass(value):
            for member, attribute in vars(value).items():
                function = getattr(attribute, "__func__", attribute)
                if not member.startswith("_") and (inspect.isroutine(function) or isinstance(attribute, property)):
                    found.append((f"{name}.{member}", getattr(value, member)))
    return found


@pytest.mark.parametrize(("name", "value"), documented(), ids=[name for name, _ in documented()])
def test_what_users_meet_has_a_docstring(name, value):
    assert inspect.getdoc(value), name


# imports


@pytest.mark.parametrize("module", sorted(PLACES))
def test_imports_point_downwards(module):
    above = {name for name in reached_from(module) if PLACES.get(name, -1) >= PLACES[module]}
    assert above == set()


@pytest.mark.parametrize("module", sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in SOURCES}))
def test_no_module_imports_itself_by_way_of_others(module):
    assert module not in reached_from(module)


@pytest.mark.parametrize("module", ["cache", "fetcher", "source", "listing", "ranks", "store", "settings", "testing"])
def test_what_needs_no_torch_does_not_import_it(module):
    for path in files(module):
        assert not re.search(r"^ *(import|from) torch", path.read_text(), re.MULTILINE), path


def test_only_the_store_speaks_s3():
    for path in SOURCES:
        place = path.relative_to(PACKAGE).parts
        if place[0] not in ("store", "demo") and place != ("testing", "local.py"):
            assert not re.search(r"^ *(import|from) (aiobotocore|botocore|aiohttp)", path.read_text(), re.MULTILINE), (
                path
            )


@pytest.mark.parametrize("module", ["asyncds", "asyncds.testing", "asyncds.cli", "asyncds.settings", "asyncds.errors"])
def test_import_is_light(module):
    script = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "botocore", "aiobotocore", "aiohttp", "torchvision", "moto"} & set(done.stdout.split())


# files


def test_types_are_announced():
    assert (PACKAGE / "py.typed").is_file()


def test_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == asyncds.__version__
    assert len(set(versions)) == len(versions)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(path, block, id=f"{path.name}-{number}")
    for path in DOCUMENTS
    if path.is_file()
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


def test_there_is_a_readme_with_code():
    assert (ROOT / "README.md").is_file()
    assert any(block.values[0].name == "README.md" for block in BLOCKS)


@pytest.mark.parametrize(("path", "block"), BLOCKS)
def test_code_of_a_document_compiles_and_imports_what_there_is(path, block):
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    compile(block, str(path), "exec", flags)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "asyncds":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
