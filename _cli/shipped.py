"""The shipped configurations, found by name."""

from __future__ import annotations

from pathlib import Path

from effvit.errors import ConfigError, close_matches

ROOT = Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Every shipped configuration by its name, such as ``detection/digits``; bases are left out."""
    found = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("_")}


def summary(path: Path) -> str:
    """The first comment line of a configuration, which says what it is."""
    with path.open(encoding="utf-8") as file:
        return next((line[1:].strip() for line in file if line.startswith("#")), "")


def find_config(name: str) -> Path:
    """The file that ``-c`` means: a path if there is such a file, otherwise a shipped configuration.

    Raises:
        ConfigError: There is neither; the message offers close matches.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped_configs()
    shipped = known.get(name.removesuffix(".yaml")) or ROOT / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file() and ROOT in shipped.resolve().parents:
        return shipped
    raise ConfigError(
        f"there is no configuration {name!r}: no such file, and none of the shipped ones. {close_matches(name, known)}"
    )
