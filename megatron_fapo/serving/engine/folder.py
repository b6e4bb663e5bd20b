"""What a Hugging Face model folder says about its model, read without torch."""

import json
from pathlib import Path
from typing import Any

from megatron_fapo.errors import DataError


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder. Raises DataError when it is not there."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise DataError(f"{folder}: no config.json, so not a Hugging Face model folder") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{folder / 'config.json'}: not JSON: {error}") from None
    return config


def eos_ids(folder: Path) -> tuple[int, ...]:
    """End-of-sequence ids, from generation_config.json before config.json as transformers reads them."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        value = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if value is not None:
            return tuple(value) if isinstance(value, list) else (value,)
    return ()
