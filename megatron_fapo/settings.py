"""The base class of every settings section, and how a YAML file and `key=value` overrides become one tree.

Sections live beside their part in `<room>/settings.py` and are light: no torch, no Ray. The docstring under a
field is its only description; the reference page is generated from it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_fapo.errors import ConfigError


class Settings(BaseModel):
    """A section of the configuration: frozen, typed, unknown keys refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)

    def changed(self, **values: Any) -> Self:
        """A validated copy with some fields replaced."""
        return type(self).model_validate({**self.model_dump(), **values})


Tree = TypeVar("Tree", bound=Settings)


def load(tree: type[Tree], path: Path, overrides: Sequence[str] = ()) -> Tree:
    """Read a YAML file (following `inherits:`), apply `a.b=value` overrides, validate.

    Raises ConfigError naming the file, the key, what was wrong and the nearest known key.
    """
    return build(tree, _read(path, seen=()), overrides, name=str(path))


def build(tree: type[Tree], values: dict[str, Any], overrides: Sequence[str] = (), name: str = "settings") -> Tree:
    """Validate `values` with `a.b=value` overrides applied. Raises ConfigError, which begins with `name`."""
    for override in overrides:
        _apply(values, override)
    try:
        return tree.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(tree, error)}") from None


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: inherits from itself")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, found {type(values).__name__}")
    parent = values.pop("inherits", None)
    return merge(_read(path.parent / parent, (*seen, path)), values) if parent else values


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of two mappings; lists and scalars of `over` replace those of `under`."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"section.key": value} of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *sections, leaf = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        values = inner
    try:
        values[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None


def explain(tree: type[BaseModel], error: ValidationError) -> str:
    """A pydantic error in one line per problem, with the nearest known key for an unknown one."""
    lines = []
    for problem in error.errors():
        path, sections = _follow(tree, problem["loc"])
        where = ".".join(path)
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown key {where!r}{_nearest(path[-1], sections)}")
        elif problem["type"] == "missing":
            lines.append(f"missing key {where!r}")
        else:
            what = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where or 'config'}: {what}" + ("" if where == "" else f", found {problem['input']!r:.200}"))
    return "; ".join(lines)


def _follow(tree: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], list[type[BaseModel]]]:
    """A location as a reader writes it, and the sections that its last part was looked up in.

    Where a key has alternatives, pydantic's location goes on with the name of the one that was taken: it is left out.
    """
    path: list[str] = []
    sections, inside, tagged = [tree], [tree], False
    for part in location:
        fields = [section.model_fields[str(part)] for section in inside if str(part) in section.model_fields]
        if tagged and not fields:
            tagged = False
            continue
        path.append(str(part))
        sections, inside = inside, [leaf for field in fields for leaf in _parts(field.annotation) if _is_section(leaf)]
        tagged = len(inside) > 1
    return path, sections


def _nearest(key: str, sections: Sequence[type[BaseModel]]) -> str:
    """`, did you mean ...?` for a key, looked up among the fields of its section."""
    known = list(dict.fromkeys(name for section in sections for name in section.model_fields))
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else f", known here: {', '.join(known)}" if known else ""


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)


def reference(tree: type[Settings]) -> str:
    """The reference page of a configuration, in Markdown: every key with its type, default and description."""
    lines = [
        "# Configuration",
        "",
        "Generated from the code by `make docs`. Override any key on the command line as `section.key=value`;",
        "`inherits: other.yaml` at the top of a file takes another file's values first.",
    ]
    lines += _reference(tree, "")
    return "\n".join(lines) + "\n"


def _reference(section: type[BaseModel], prefix: str) -> list[str]:
    lines: list[str] = []
    inner: list[tuple[str, type[BaseModel]]] = []
    rows: list[str] = []
    for name, field in section.model_fields.items():
        sections = [part for part in _parts(field.annotation) if _is_section(part)]
        if len(sections) == 1:
            inner.append((f"{prefix}{name}", sections[0]))
        elif sections:
            inner += [(f"{prefix}{name} ({_label(part)})", part) for part in sections]
        else:
            default = "required" if field.is_required() else f"`{_plain(field.default)}`"
            kind = f"`{_spell(field.annotation)}`{_bounds(field.metadata)}"
            rows.append(f"| `{name}` | {kind} | {default} | {(field.description or '').replace(chr(10), ' ')} |")
    if rows:
        about = " ".join((section.__doc__ or "").split())
        lines += ["", f"## {prefix.removesuffix('.')}", "", about, "", "| key | type | default | what it does |"]
        lines += ["|---|---|---|---|", *rows]
    for title, part in inner:
        lines += _reference(part, f"{title}.")
    return lines


def _label(section: type[BaseModel]) -> str:
    """What tells a section from its alternatives: its `name`, else the key that it begins with."""
    fields = section.model_fields
    return str(fields["name"].default) if "name" in fields else next(iter(fields))


def _parts(annotation: Any) -> list[Any]:
    """The alternatives of a union, nested ones and annotated ones too."""
    arguments = [part for part in getattr(annotation, "__args__", ()) if part is not type(None)]
    return [leaf for part in arguments for leaf in _parts(part)] if arguments else [annotation]


def _spell(annotation: Any) -> str:
    """A type as a reader would write it."""
    if isinstance(annotation, type) and not getattr(annotation, "__args__", None):
        return annotation.__name__
    text = str(annotation).replace("typing.", "").replace("pathlib.", "").replace("NoneType", "null")
    return (
        re.sub(r"Annotated\[(\w+), .*?\)\]\)\]|Annotated\[(\w+), .*?\)\]", r"\1\2", text)
        .replace("None", "null")
        .replace("|", "or")
    )


def _bounds(metadata: Sequence[Any]) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [
        f"{sign} {getattr(bound, key)}" for bound in metadata for key, sign in signs.items() if hasattr(bound, key)
    ]
    return f" {', '.join(found)}" if found else ""


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
