"""A writer of Megatron datasets that knows nothing of the reader."""

import struct

CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}


def write(prefix, documents, letter="H"):
    """Documents are lists of sequences, lists of ids; written one value at a time, as Megatron-LM's IndexedDatasetBuilder does."""
    sequences = [sequence for document in documents for sequence in document]
    starts = [0]
    for document in documents:
        starts.append(starts[-1] + len(document))
    with open(f"{prefix}.bin", "wb") as file:
        offsets = []
        for sequence in sequences:
            offsets.append(file.tell())
            file.write(b"".join(struct.pack("<" + letter, token) for token in sequence))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[letter]))
        file.write(struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(starts)))
        for values, kind in (([len(s) for s in sequences], "<i"), (offsets, "<q"), (starts, "<q")):
            file.write(b"".join(struct.pack(kind, value) for value in values))
    return str(prefix)
