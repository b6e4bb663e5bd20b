"""Pieces of HTML, escaped by construction, and JSON that cannot end the script element it lies in."""

import json
from html import escape
from typing import Any


def text(value: object) -> str:
    """Text for element content or a quoted attribute."""
    return escape(str(value), quote=True)


def element(tag: str, *content: str, **attributes: object) -> str:
    """An element around ready HTML; attribute values are escaped, `class_` spells `class`, `a_b` spells `a-b`."""
    shown = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return f"<{tag}{shown}>{''.join(content)}</{tag}>"


def data_script(name: str, value: Any) -> str:
    """`value` as JSON in a script element that no browser executes; the page's script reads it by its id."""
    encoded = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        encoded = encoded.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{text(name)}">{encoded}</script>'


def percent(share: float | None, digits: int = 1) -> str:
    """`0.123` as `12.3 %`; a dash where there is nothing."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def number(value: float | None, form: str = ".3g") -> str:
    """A number; a dash where there is nothing."""
    return "–" if value is None else format(value, form)
