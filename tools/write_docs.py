"""Write the pages that are generated from the code; tests/test_docs.py keeps them true."""

from pathlib import Path

from megatron_fapo.config import Config
from megatron_fapo.observe.metrics import glossary
from megatron_fapo.settings import reference

DOCS = Path(__file__).parent.parent / "docs"


def pages() -> dict[str, str]:
    """{file name: content}."""
    return {"config.md": reference(Config), "metrics.md": glossary()}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text)
