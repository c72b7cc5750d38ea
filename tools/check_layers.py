"""Check which part of fp8jax imports which: an import only ever points down, and modules form no circle.

    python tools/check_layers.py            # the checkout that this file is in; exit code 1 if anything is wrong

The table below is the house of docs/architecture.md. A line of output names the file, the line and
the import.
"""

import ast
import pathlib
import sys
from collections.abc import Iterator, Mapping

# Each part, top first, and what it may import beside itself. A module directly in fp8jax is a part
# of its own.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "runs": frozenset("cli training interop plan config hardware".split()),
    "cli": frozenset(
        "training monitor audit interop plan data models parallel config hardware numerics files exit_codes".split()
    ),
    "nnx": frozenset("library numerics".split()),
    "linen": frozenset("nnx library numerics".split()),
    "library": frozenset("parallel numerics".split()),
    "training": frozenset(
        "monitor audit interop plan data models parallel config numerics files exit_codes".split()
    ),
    "monitor": frozenset("config numerics files".split()),
    "audit": frozenset("config".split()),
    "presets": frozenset("data config hardware".split()),
    "interop": frozenset("plan models data config numerics files".split()),
    "plan": frozenset("models parallel data config numerics".split()),
    "data": frozenset("config files".split()),
    "models": frozenset("parallel config numerics".split()),
    "parallel": frozenset("config".split()),
    "config": frozenset("numerics files".split()),
    "exit_codes": frozenset(),
    "files": frozenset(),
    "hardware": frozenset(),
    "numerics": frozenset(),
}
# The package itself names public objects for readers of types, and loads them at first use.
FRONT = "fp8jax"
# The lowest part is plain JAX: arrays and small pytrees.
NUMERICS_WITHOUT = frozenset("flax optax orbax grain ml_collections absl".split())


def main(root: pathlib.Path) -> int:
    """Check a checkout; print what is wrong and return the exit code."""
    faults = list(check(root))
    print("\n".join(faults) if faults else "imports point down, no circles")
    return 1 if faults else 0


def check(root: pathlib.Path) -> Iterator[str]:
    """Yield a line for each import that points up or sideways, and one for each circle of modules.

    Args:
        root: directory that holds the package fp8jax.
    """
    modules = {_name(path, root): path for path in sorted((root / "fp8jax").rglob("*.py"))}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for line, target in _imports(path, name, modules):
            if target in modules and name != FRONT:
                graph[name].add(target)
            fault = _fault(name, target)
            if fault:
                yield f"{path.relative_to(root)}:{line}: {fault}"
    circle = _circle(graph)
    if circle:
        yield f"circle: {' -> '.join(circle)}"


def _fault(name: str, target: str) -> str | None:
    """Return what is wrong with an import, None if nothing is."""
    here, there = _part(name), _part(target)
    if here == "numerics" and target.split(".")[0] in NUMERICS_WITHOUT:
        return f"numerics imports {target}; it is plain JAX"
    if here not in MAY_IMPORT or there is None or there == here:
        return None
    if there not in MAY_IMPORT[here]:
        return f"{here} imports {there}; see docs/architecture.md"
    return None


def _part(module: str) -> str | None:
    """Return the part of the house that a module is in; None for other packages and for fp8jax itself."""
    parts = module.split(".")
    if parts[0] != "fp8jax" or len(parts) < 2:
        return None
    return parts[1]


def _name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(
    path: pathlib.Path, name: str, modules: Mapping[str, pathlib.Path]
) -> Iterator[tuple[int, str]]:
    """Yield the line and the module of each import of a file, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".")
                package = package if path.name == "__init__.py" else package[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole in modules else base


def _circle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Return a circle of modules that import each other, if there is one."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for target in sorted(graph[module]):
            found = visit(target, [*path, module])
            if found:
                return found
        done.add(module)
        return None

    for module in graph:
        found = visit(module, [])
        if found:
            return found
    return None


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(__file__).resolve().parent.parent))
