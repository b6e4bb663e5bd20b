"""What SGLang reads from a request, written without torch."""

import struct


def table_of_contents(text: str) -> bytes:
    """Named tensors as SGLang unpickles them, `[(text, torch.Tensor())]`: our loader reads the name.

    Pickle protocol 2, by its opcodes: list, string, torch.Tensor called with no arguments, pair, append, stop.
    """
    data = text.encode()
    return b"".join(
        (b"\x80\x02", b"]", b"X", struct.pack("<I", len(data)), data, b"ctorch\nTensor\n", b")R", b"\x86", b"a", b".")
    )
