"""The fields that define a run: changing one on a continued run would make it another."""

_FIXED = {
    "model": None,  # all of it
    "data": ("sequence_length", "source", "tokenizer", "packing", "document_masks"),
    "training": ("batch_size", "seed"),
    "optimizer": ("name",),
}


def is_fixed(section: str, name: str) -> bool:
    """Return whether a field is one of them."""
    names = _FIXED.get(section, ())
    return names is None or name in names


def described() -> str:
    """Return a description of all fixed fields."""
    named = (f"{section}.{name}" for section, names in _FIXED.items() for name in names or ())
    return f"{', '.join(named)} and the fields of model"
