"""Make the six `*.txt.xz` files beside this script from the R package janeaustenr. fp8jax runs
without this script.

    python fp8jax/data/corpus/make_corpus.py PATH/janeaustenr/data/Rdata.rdb

`Rdata.rdb` is the package's lazy-load database: one entry a novel, each a 4-byte big-endian length
followed by a zlib stream of that length once decompressed, which holds an R vector of strings in
XDR form, one string a line of text. The script reads that one layout and no other R data.
"""

import lzma
import pathlib
import struct
import sys
import zlib
from collections.abc import Iterator

STRING_VECTOR = b"\0\0\0\x10"


def entries(database: bytes) -> Iterator[bytes]:
    """Yield the decompressed entries of a lazy-load database, in order."""
    while database:
        (length,) = struct.unpack(">I", database[:4])
        stream = zlib.decompressobj()
        entry = stream.decompress(database[4:])
        if len(entry) != length:
            raise ValueError(f"an entry of {len(entry)} bytes where {length} were announced")
        yield entry
        database = stream.unused_data


def lines(entry: bytes) -> Iterator[bytes]:
    """Yield the strings of an R vector of strings: after its type and count, (flags, length, bytes)
    for each.
    """
    start = entry.index(STRING_VECTOR) + 4
    (count,) = struct.unpack_from(">I", entry, start)
    start += 4
    for _ in range(count):
        _, length = struct.unpack_from(">II", entry, start)
        yield entry[start + 8 : start + 8 + length]
        start += 8 + length


def main() -> None:
    """Write one file per novel, named after its first line."""
    database = pathlib.Path(sys.argv[1]).read_bytes()
    for entry in entries(database):
        text = b"\n".join(lines(entry))
        text.decode("utf-8")
        title = text.split(b"\n", 1)[0].decode().lower().replace(" ", "_")
        path = pathlib.Path(__file__).with_name(f"{title}.txt.xz")
        path.write_bytes(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        print(f"{path.name}: {len(text)} bytes of text")


if __name__ == "__main__":
    main()
