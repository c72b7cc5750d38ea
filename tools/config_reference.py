"""Write docs/configuration.md, the reference of all fields of a configuration, from the code.

python tools/config_reference.py            # writes the page
python tools/config_reference.py --check    # exit code 1 if the page differs from the code
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fp8jax.config import Config, kind_of

PAGE = ROOT / "docs" / "configuration.md"
_SIGNS = {"at_least": "≥", "above": ">", "at_most": "≤", "below": "<"}
_HEAD = """# Every field of a configuration

Written by `python tools/config_reference.py` from `fp8jax/config`; the gate compares it with the code. A field is set on the
command line, `--config.SECTION.FIELD=VALUE`, or in a file under `configs/`. Defaults are those of the fields; a preset
(`fp8jax/presets/common.py`) sets sizes, rates and lengths on top of them. What a run took is in its `config.json`.

`None` as a default means that the field is filled in from others, or that there is no such limit, as its meaning says.
"""


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for section in dataclasses.fields(Config):
        parts.append(f"## `{section.name}`\n\n{_sentence(section.type.__doc__ or '')}\n")
        parts.append("\n".join(_table(section.type)) + "\n")
    return "\n".join(parts)


def _table(section: type) -> Iterator[str]:
    yield "| field | default | values | meaning |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(section):
        default = f"`{field.default!r}`" if field.default != "" else "empty"
        yield f"| `{field.name}` | {default} | {_values(field)} | {_cell(field.metadata['doc'])} |"


def _values(field: dataclasses.Field) -> str:
    """Describe what a field may hold: its choices, or its type and bounds."""
    if field.metadata["choices"]:
        return ", ".join(f"`{choice}`" for choice in field.metadata["choices"])
    bounds = [
        f"{sign} {_number(field.metadata[key])}"
        for key, sign in _SIGNS.items()
        if field.metadata[key] is not None
    ]
    kind, optional = kind_of(field.type)
    return ", ".join([kind.__name__ + " or None" * optional, *bounds])


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _sentence(doc: str) -> str:
    return " ".join(doc.split())


def _cell(text: str) -> str:
    return _sentence(text).replace("|", "\\|")


def main() -> int:
    """Write the page, or compare it; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare only")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print(
        "docs/configuration.md is not what the code says: run python tools/config_reference.py",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
