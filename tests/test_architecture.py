"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

GROUND = {"_cache", "errors", "categories", "__version__"}
ALLOWED = {
    "backbones": {"backbones", "_cache", "errors"},
    "tasks": {"tasks", "backbones"} | GROUND,
    "datamodules": {"datamodules"} | GROUND,
    "deploy": {"deploy"} | GROUND,
    "callbacks": {"callbacks", "deploy"} | GROUND,
    "_cache": set(),
    "errors": set(),
    "categories": {"errors"},
}
FOREIGN = {"backbones": {"lightning", "torchvision", "timm", "mmdet"}}
#: timm is an extra; the one file about its networks imports it, and only inside the functions that need it.
EXCEPT = {"backbones/timm.py": {"timm"}}


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports, ``from effvit import x`` counted as ``effvit.x``; relative imports fail."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "effvit" else {module}
    return names


def files_of(room: str) -> list[Path]:
    single = ROOT / f"{room}.py"
    return [single] if single.is_file() else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_follow_the_arrows(room):
    files = files_of(room)
    assert files
    for path in files:
        for name in imported_modules(path):
            parts = name.split(".")
            if parts[0] == "effvit" and len(parts) > 1:
                assert parts[1] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
            forbidden = FOREIGN.get(room, set()) - EXCEPT.get(path.relative_to(ROOT).as_posix(), set())
            assert parts[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("file", "modules"), EXCEPT.items())
def test_an_extra_is_only_imported_where_it_is_needed(file, modules):
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not modules & {name.split(".")[0] for name in imported}


def test_every_room_is_packaged():
    import tomllib

    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {"effvit"} | {
        "effvit." + path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for room in ("_cli", "backbones", "callbacks", "configs", "datamodules", "deploy", "tasks")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert packages == rooms


@pytest.mark.parametrize("arguments", [["--help"], ["configs"], ["--version"]])
def test_light_verbs_import_neither_torch_nor_lightning(arguments):
    code = (
        "import sys\nfrom effvit.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'lightning', 'numpy', 'jsonargparse'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_compromised_lightning_releases_are_excluded():
    text = (ROOT / "pyproject.toml").read_text()
    assert "!=2.6.2" in text
    assert "!=2.6.3" in text
