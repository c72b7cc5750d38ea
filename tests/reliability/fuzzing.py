"""What fuzz tests share: how many cases, values of any kind, damage."""

import datetime
import json
import math
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fp8jax import config as config_lib

# Ten seconds a case are a hang.
CASES = int(os.environ.get("FP8JAX_FUZZ_CASES", "3000"))
MANY = settings(
    max_examples=CASES,
    deadline=datetime.timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
)
NAMES = st.sampled_from(
    sorted(
        {
            name
            for section in config_lib.to_dict(config_lib.Config()).items()
            for name in (section[0], *section[1])
        }
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)
# Numbers that break what trusts them.
WILD = st.sampled_from(
    [
        -1,
        0,
        1,
        2**31,
        2**63,
        2**64,
        10**30,
        10**400,
        -(10**400),
        1e308,
        math.inf,
        math.nan,
        True,
        None,
        "",
        "1",
        [],
        {},
    ]
)


def one_line(error):
    assert str(error) and "\n" not in str(error) and len(str(error)) < 3000


def damaged(data, content):
    """Bytes with one to four of them changed, cut out, or put in; or cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["change", "cut out", "put in", "cut off"]))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut out":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif kind == "put in":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at:]
    return bytes(content)


def altered(data, values):
    """JSON values of which one or two, anywhere, are replaced, removed or added to."""
    values = json.loads(json.dumps(values))
    for _ in range(data.draw(st.integers(1, 2))):
        here = values
        while True:
            key = data.draw(
                st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here)))
            )
            if (
                not (isinstance(here[key], dict | list) and here[key])
                or data.draw(st.integers(0, 3)) == 0
            ):
                break
            here = here[key]
        if data.draw(st.booleans()) and isinstance(here, dict):
            here[data.draw(st.text(max_size=5))] = here.pop(key)
        else:
            here[key] = data.draw(WILD | JSON)
        if not values:
            break
    return json.dumps(values).encode()
