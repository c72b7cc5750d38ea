"""Parse the text of an optimized XLA program (`compiled.as_text()`) and walk what it executes.

    module = hlo.parse(text)
    for run in hlo.executed(module):                 # entry, loop bodies, branches; fusions are one instruction
        run.instruction.opcode, run.count, ...

Only what the audit reads is kept: names, shapes, operands, and the rest of a line as text. The
parser interprets nothing; an unknown instruction is kept like any other.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# HLO's names of dtypes → NumPy's names, as the rest of fp8jax writes them, and bits of an element.
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}
_LETTERS = {"f": "float", "s": "int", "u": "uint", "c": "complex"}

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)?)")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = {
    key: re.compile(rf"\b{key}=%?([\w.\-]+)") for key in ("calls", "body", "condition", "to_apply")
}
_NESTED = re.compile(r"\b(?:calls=%?([\w.\-]+)|called_computations=\{([^}]*)\})")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TRIPS = re.compile(r'known_trip_count[":{\s]*n[":\s]*(\d+)')


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of one array; `layout` lists dimensions from the fastest-varying one, and is empty
    if unknown.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Return the bytes, without padding by the layout's tiles."""
        digits = re.findall(r"(?:int|float|complex)(\d+)", self.dtype)
        bits = {"bool": 8, "bfloat16": 16}.get(self.dtype, int(digits[0]) if digits else 0)
        return self.size * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `shapes` are the leaves of its result, `attributes` all text after
    the operands.

    An operand `tuple.3#2` is an element of `tuple.3`, as newer compilers write
    `get-tuple-element(%tuple.3), index=2`; `parse` puts that instruction before its first user.
    `result` is the text that `shapes` was read from.
    """

    name: str
    opcode: str
    shapes: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool
    result: str = ""

    @property
    def bytes(self) -> int:
        """Return the bytes of the result, all leaves."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def scope(self) -> str:
        """Return the name stack of the JAX operation that it came from."""
        found = _OP_NAME.search(self.attributes)
        return found.group(1) if found else ""

    @property
    def target(self) -> str:
        """Return the target of a custom call, otherwise an empty string."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def called(self, key: str) -> str | None:
        """Return the name of the computation called as `calls`, `body`, `condition` or `to_apply`."""
        found = _CALLED[key].search(self.attributes)
        return found.group(1) if found else None

    def branches(self) -> list[str]:
        """Return the computations of a conditional."""
        found = [a or b for a, b in _BRANCHES.findall(self.attributes)]
        return [
            name.strip().lstrip("%") for part in found for name in part.split(",") if name.strip()
        ]

    def dimensions(self, key: str) -> tuple[int, ...]:
        """Return an attribute such as `dimensions={0,1}`; empty if there is none."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()

    def backend_config(self) -> dict[str, Any]:
        """Return the backend's JSON; empty if there is none."""
        start = self.attributes.find("backend_config={")
        if start < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes, start + len("backend_config="))[0]
        except ValueError:
            return {}


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the entry."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, its computation, how often it runs, and whether that number is certain."""

    instruction: Instruction
    computation: Computation
    count: int = 1
    known: bool = True

    def operands(self) -> list[Instruction]:
        """Return the instructions that the operands come from."""
        return [
            self.computation[name] for name in self.instruction.operands if name in self.computation
        ]


def root(computation: Computation) -> Instruction:
    """Return the instruction whose result is the computation's."""
    return next((i for i in computation.values() if i.root), list(computation.values())[-1])


def parse(text: str) -> Module:
    """Parse a module's text.

    Raises:
        ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current.update(_elements(instruction.operands, current))
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("not the text of an XLA program: it has no ENTRY computation")
    return Module(computations, entry)


def executed(module: Module) -> Iterator[Executed]:
    """Yield every instruction that runs, loops multiplied out, every branch of a conditional, a
    fusion as one.
    """
    yield from _executed(module, module.entry, 1, True)


def nested(module: Module, run: Executed) -> Iterator[Executed]:
    """Yield what is inside a fusion, an asynchronous start or a kernel that XLA wrote, at all
    depths.
    """
    if run.instruction.opcode in ("async-update", "async-done"):
        return
    for single, several in _NESTED.findall(run.instruction.attributes):
        for name in [single] if single else _NAME.findall(several):
            computation = module.computations.get(name, {})
            for instruction in computation.values():
                inner = Executed(instruction, computation, run.count, run.known)
                yield inner
                yield from nested(module, inner)


def _executed(module: Module, name: str, count: int, known: bool) -> Iterator[Executed]:
    computation = module.computations.get(name, {})
    for instruction in computation.values():
        yield Executed(instruction, computation, count, known)
        inner, times, sure = [], count, known
        if instruction.opcode == "while":
            trips = _trips(module, Executed(instruction, computation))
            inner, times, sure = (
                [instruction.called("body")],
                count * (trips or 1),
                known and trips is not None,
            )
        elif instruction.opcode == "conditional":
            inner, sure = instruction.branches(), False
        elif instruction.opcode == "call":
            inner = [instruction.called("to_apply")]
        for callee in inner:
            if callee:
                yield from _executed(module, callee, times, sure)


def _trips(module: Module, run: Executed) -> int | None:
    """Return how often a loop runs: the compiler's note, or the one constant that its condition
    compares with.
    """
    loop = run.instruction
    noted = _TRIPS.search(loop.attributes)
    if noted:
        return int(noted.group(1))
    condition = module.computations.get(loop.called("condition") or "", {})
    runs = [Executed(instruction, condition) for instruction in condition.values()]
    runs += [inner for run in runs for inner in nested(module, run)]
    compared = [
        run
        for run in runs
        if run.instruction.opcode == "compare" and "direction=LT" in run.instruction.attributes
    ]
    constants = {run.instruction.arguments for run in runs if run.instruction.opcode == "constant"}
    only = constants.pop() if len(compared) == 1 and len(constants) == 1 else ""
    if not only.isdigit():
        return None
    first, step = _counter(module, run, compared[0])
    return max(-((first - int(only)) // step), 0)


def _counter(module: Module, run: Executed, compared: Executed) -> tuple[int, int]:
    """Return a loop counter's start and increment, if they are constants, otherwise JAX's own 0 and
    1.
    """
    index = next(
        (
            number(i.attributes, "index", -1)
            for i in compared.operands()
            if i.opcode == "get-tuple-element"
        ),
        -1,
    )
    body = module.computations.get(run.instruction.called("body") or "", {})
    if index < 0 or not body:
        return 0, 1
    begin = _tuple_element(next(iter(run.operands()), None), index, run.computation)
    after = _tuple_element(root(body), index, body)
    steps = (
        [_constant(body.get(name), body) for name in after.operands]
        if after and after.opcode == "add"
        else []
    )
    return _constant(begin, run.computation) or 0, next((step for step in steps if step), 1)


def _tuple_element(
    value: Instruction | None, index: int, computation: Computation
) -> Instruction | None:
    return computation.get(value.operands[index]) if value and value.opcode == "tuple" else None


def _constant(value: Instruction | None, computation: Computation) -> int | None:
    """Return a whole number; None for anything else."""
    while value and value.opcode in ("copy", "bitcast"):
        value = computation.get(value.operands[0])
    return (
        int(value.arguments)
        if value and value.opcode == "constant" and value.arguments.isdigit()
        else None
    )


def _elements(operands: tuple[str, ...], computation: Computation) -> Computation:
    """Return instructions that take elements of tuples, for operands written `name#index`."""
    found = {}
    for name in operands:
        base, _, index = name.partition("#")
        if index and name not in computation and base in computation:
            shape = _split(computation[base].result)[int(index)]
            found[name] = Instruction(
                name,
                "get-tuple-element",
                _shapes(shape),
                (base,),
                f"%{base}",
                f", index={index}",
                False,
                shape,
            )
    return found


def _split(shape: str) -> list[str]:
    """Return the elements of a tuple's shape, which may be tuples again."""
    parts, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "({[") - (letter in ")}]")
        if depth == 1 and letter == "," or depth == 0:
            parts.append(shape[start:i])
            start = i + 1
    return parts


def _instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close - 1]
    return Instruction(
        head.group(2),
        opcode.group(1),
        _shapes(line[start:end]),
        tuple(_NAME.findall(arguments)),
        arguments,
        line[close:],
        head.group(1) is not None,
        line[start:end],
    )


def _closing(line: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    return len(line)


def _shapes(text: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            _dtype(kind),
            *(
                tuple(int(n) for n in part.split(",") if n)
                for part in (dims.replace("<=", ""), layout)
            ),
        )
        for kind, dims, layout in _ARRAY.findall(text)
    )


def _dtype(kind: str) -> str:
    if kind in _DTYPES:
        return _DTYPES[kind]
    if kind.startswith("f8"):
        return f"float8_{kind[2:]}"
    found = re.fullmatch(r"([fsuc])(\d+)", kind)
    return _LETTERS[found.group(1)] + found.group(2) if found else kind


def window(attributes: str) -> dict[str, str]:
    """Return the fields of a convolution's `window={...}`."""
    found = re.search(r"\bwindow=\{([^}]*)\}", attributes)
    return dict(part.split("=") for part in found.group(1).split()) if found else {}


def number(attributes: str, key: str, default: int = 1) -> int:
    """Return a numeric attribute, as `key=3` or in JSON."""
    found = re.search(rf'\b{key}"?[=:]\s*"?(\d+)', attributes)
    return int(found.group(1)) if found else default
