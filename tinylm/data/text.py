"""Text in UTF-8, read in pieces."""

import codecs
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20  # bytes of text, or tokens, processed at a time: the arrays stay in the cache


def language_reference() -> str:
    """The Python language reference, a text of 0.5 MB that comes with every installation of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file. Raises ValueError that says why not: unreadable, empty, or not text."""
    return "".join(text for text, _ in read_chunks(path))


def read_chunks(path: str | Path, size: int = CHUNK) -> Iterator[tuple[str, int]]:
    """The text of a UTF-8 file in pieces of `size` bytes, each with its size; raises what `read_text` raises."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # keeps a character that lies across a border
    offset = length = 0
    try:
        with open(path, "rb") as file:
            while True:
                kept = len(decoder.getstate()[0])
                content = file.read(size)
                try:
                    text = decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    byte, at = error.object[error.start], offset - kept + error.start
                    raise ValueError(f"{path} is not UTF-8 text: byte 0x{byte:02x} at offset {at}") from None
                if 0 in content:
                    raise ValueError(f"{path} is not text: byte 0x00 at offset {offset + content.index(0)}")
                if offset == 0:
                    text = text.removeprefix("\ufeff")  # the byte-order mark that some editors write
                offset += len(content)
                length += len(text)
                if not content:
                    break
                yield text, len(content)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not length:
        raise ValueError(f"{path} is empty")
