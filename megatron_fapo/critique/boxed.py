r"""The last `\boxed{...}` of a text, by which policies give answers and judges give verdicts."""

OPENING = "\\boxed{"


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{` holds, up to its matching brace; None without one, or when it never closes.

    An escaped brace (`\{`) does not count, so `\boxed{\{1, 2\}}` holds `\{1, 2\}`.
    """
    start = text.rfind(OPENING)
    if start < 0:
        return None
    start += len(OPENING)
    depth = 1
    position = start
    while position < len(text):
        match text[position]:
            case "\\":
                position += 1
            case "{":
                depth += 1
            case "}":
                depth -= 1
                if depth == 0:
                    return text[start:position]
            case _:
                pass
        position += 1
    return None
