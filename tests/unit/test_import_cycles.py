"""No module of the product imports itself in a circle: each can be read, and imported, before what stands on it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests.unit.test_house import PACKAGES, PROJECT


def product_modules() -> dict[str, Path]:
    """Files by the name they are imported as."""
    modules = {}
    for package, folder in {"edgephi": PROJECT / "edgephi", **PACKAGES}.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            modules[".".join(parts).removesuffix(".__init__")] = file
    return modules


def imported_with_the_module(statements: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports outside of functions, those for type checkers alone left out."""
    for statement in statements:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield statement
        elif isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            yield from imported_with_the_module(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for block in ("body", "orelse", "finalbody"):
                yield from imported_with_the_module(getattr(statement, block, []))
            for handler in getattr(statement, "handlers", []):
                yield from imported_with_the_module(handler.body)


def arrows(modules: Mapping[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others. `from package import module` leads to the module."""
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        imported = set()
        for statement in imported_with_the_module(ast.parse(file.read_text(encoding="utf-8")).body):
            if isinstance(statement, ast.Import):
                imported |= {alias.name for alias in statement.names}
            else:
                for alias in statement.names:
                    whole = f"{statement.module}.{alias.name}"
                    imported.add(whole if whole in modules else str(statement.module))
        found[name] = {other for other in imported if other in modules and other != name}
    return found


def circle(found: Mapping[str, set[str]]) -> list[str]:
    """The modules of a circle, in its order; none: there is no circle."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        modules: list[str] = error.args[1]
        return modules
    return []


def test_no_module_is_imported_in_a_circle() -> None:
    assert circle(arrows(product_modules())) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    texts = {
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import c\nimport b",
        "b": "try:\n    import c\nexcept ImportError:\n    c = None",
        "c": "def later():\n    import b",
    }
    modules = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        modules[name].write_text(text, encoding="utf-8")
    assert circle(arrows(modules)) == []
    modules["c"].write_text("import a", encoding="utf-8")
    assert set(circle(arrows(modules))) == {"a", "b", "c"}
