"""Try a tokenizer.json out in a process of its own, before this one reads it.

    run("tokenizer.json", ["a text"])       # ValueError if it ends the process, or takes too long or too much memory

The library `tokenizers` is native code, and its files hold regular expressions and tables that
anyone may have written: a file can end a process that reads it, or hang it. The child reads the
file and encodes texts, under limits of time and memory.
"""

import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterable

SECONDS, MEMORY = 60, 2 << 30
_WORDS = (
    "Anne ELLIOT's  na\u00efve e\u0301lan\r\n\t 1234567 ... \U0001f600 "
    + "a" * 4096
    + " " * 4096
    + "\n" * 512
)
# The child's program runs without our package, whose imports take longer than most files.
_CHILD = """
import json, resource, sys
asked = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_AS, (asked["memory"],) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path[:] = asked["modules"]
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(asked["path"])
for text in asked["texts"]:
    tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids)
"""


def run(path: str | pathlib.Path, texts: Iterable[str] = ()) -> None:
    """Try a tokenizer.json out; return without a message if it works.

    Args:
        path: path of the file.
        texts: texts to encode and decode, besides one of this module.

    Raises:
        ValueError: the file ended its process or the library refused it; the message is one line.
    """
    asked = {"memory": MEMORY, "modules": sys.path, "path": str(path), "texts": [_WORDS, *texts]}
    command = [sys.executable, "-I", "-c", _CHILD]
    environment = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"takes more than {SECONDS} seconds to read and to encode a short text"
        ) from None
    if done.returncode == 0:
        return
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError(
            f"ends its process with {name}: it takes more than {MEMORY >> 30} GiB of memory, or "
            f"breaks the library"
        )
    lines = done.stderr.decode(errors="replace").splitlines() or [f"exit code {done.returncode}"]
    raise ValueError(lines[-1][:300])
