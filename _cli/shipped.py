"""The shipped configurations, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effvit.errors import ConfigError, close_matches

ROOT = Path(__file__).resolve().parent.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Every shipped configuration by its name, such as ``detection/digits``; bases are left out."""
    return {name: path for name, path in _all_configs().items() if not name.startswith("_")}


def _all_configs() -> dict[str, Path]:
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.yaml"))}


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


def with_bases(path: Path) -> list[Path]:
    """A configuration after those that it builds on: what to parse, in this order, later ones winning.

    A configuration names them under ``base``, one name or a list: a file beside it, or a shipped configuration such as
    ``_base/imagenet``. Bases may have bases. One that is reached twice is parsed once, where it first occurs.

    Args:
        path: The configuration.

    Raises:
        ConfigError: A base does not exist, is no name, or is built on what it is the base of.
    """
    ordered: dict[Path, None] = {}
    _collect(path, (), ordered)
    return list(ordered)


def _collect(path: Path, above: tuple[Path, ...], ordered: dict[Path, None]) -> None:
    """Adds ``path`` to ``ordered`` after its bases; ``above`` are the configurations that led here."""
    resolved = path.resolve()
    if resolved in above:
        chain = " -> ".join(str(file) for file in (*above[above.index(resolved) :], resolved))
        raise ConfigError(f"{path}: configurations are built on each other in a circle: {chain}")
    for name in _bases(path):
        _collect(_find_base(name, path), (*above, resolved), ordered)
    ordered.setdefault(path)


def _bases(path: Path) -> list[str]:
    """What a configuration names under ``base``."""
    import yaml

    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []  # the parser says what is wrong in it, with the line
    base = content.get("base") if isinstance(content, dict) else None
    names = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: base must be the name of a configuration, or a list of names, not {base!r}")
    return names


def _find_base(name: str, path: Path) -> Path:
    """The file that a name under ``base`` in ``path`` means."""
    beside = path.parent / f"{name.removesuffix('.yaml')}.yaml"
    if beside.is_file():
        return beside
    known = _all_configs()
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    raise ConfigError(
        f"{path}: there is no base {name!r}: no such file beside it, and no shipped configuration. "
        f"{close_matches(name, known)}"
    )


def merged_config(path: Path) -> dict[str, Any]:
    """What a configuration and its bases say together, as the parser will read them.

    Args:
        path: The configuration.

    Raises:
        ConfigError: A base cannot be found, see `with_bases`; or a file is no YAML mapping.
    """
    import yaml

    merged: dict[str, Any] = {}
    for file in with_bases(path):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is no YAML: {error}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds no settings")
        merged = _merge(merged, content)
    return merged


def _merge(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """``upper`` over ``lower``, key by key; another class starts without the arguments of the one before."""
    if upper.get("class_path", lower.get("class_path")) != lower.get("class_path"):
        return upper
    both = {
        key: _merge(lower[key], value) if isinstance(lower.get(key), dict) and isinstance(value, dict) else value
        for key, value in upper.items()
    }
    return {**lower, **both}
