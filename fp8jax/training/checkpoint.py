"""Checkpoints of a run, under WORKDIR/checkpoints, and its configuration, WORKDIR/config.json.

    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(20, {"params": params, "opt_state": opt_state}, data_state={"step": 20})   # in the background
        step = checkpoints.latest_step()                                                            # or None
        state, data_state = checkpoints.restore(step, abstract_state)

`abstract_state` has the structure of the state, with a `jax.ShapeDtypeStruct` (shape, dtype, sharding) for each array.
The sharding may be of another mesh or another number of devices than the one that saved.

A state is a dictionary of pytrees of arrays. Each of its entries is an *item* that can be restored without the others
(`partial=True`): evaluation leaves the optimizer alone. On disk an item is a nested dictionary of arrays by name,
whatever its containers were, so Orbax alone can read it too; tuples, dataclasses and empty containers come back from
`abstract_state`.

Not here: when to save, and what belongs to a state.
"""

import contextlib
import difflib
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1

from fp8jax import config as config_lib

State = dict[str, Any]  # item → pytree
Names = tuple[str, ...]

# Orbax tells some 70 lines of its inner life a save at INFO, absl's level in any program under absl.app.
_ORBAX = os.path.join("orbax", "checkpoint")
absl_logging.get_absl_logger().addFilter(lambda line: line.levelno >= logging.WARNING or _ORBAX not in line.pathname)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is one line: what, where, what to do."""


class Checkpoints:
    """Saves and restores states of a run. Only `save` ever writes: readers may look on while a run is training.

    Args:
        workdir: directory of the run.
        keep: newest checkpoints that stay; older ones go once a newer one is complete. At least 1.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int):
        # Orbax takes absolute paths only.
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._writer: v1.training.Checkpointer | None = None

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints on disk, ascending."""
        # Not Checkpointer.checkpoints, which counts a save that has only begun.
        if not self.directory.exists():
            return []
        return sorted(found.step for found in v1.path.step.standard_name_format().find_all(self.directory))

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None where there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: State, data_state: dict[str, Any]) -> None:
        """Start saving; files are written in the background and get their final name when complete.

        Returns when the arrays are copied, so the next step may take their memory (donation). An earlier save still
        under way is finished first. A step that is already saved stays as it is.

        Args:
            step: steps taken so far.
            state: item → pytree of jax arrays, of any dtype, PRNG keys included.
            data_state: where the data stands, as JSON values.

        Raises:
            CheckpointError: this save cannot begin, or the earlier one failed.
        """
        self.wait()
        if step in self.steps():
            return
        items = {item: _nested(tree) for item, tree in state.items()}
        # A training loop may forbid implicit transfers to the host; copying the state there is what a save is for.
        with self._failures(), jax.transfer_guard("allow"):
            self._checkpointer().save_checkpointables_async(
                step,
                {item: tree for item, tree in items.items() if tree},  # Orbax refuses an empty item
                force=True,  # else Orbax's own policy may skip a step
                custom_metadata={"data_state": data_state},
            )

    def restore(self, step: int, abstract_state: State, partial: bool = False) -> tuple[State, dict[str, Any]]:
        """Read a checkpoint.

        Args:
            step: one of `steps()`.
            abstract_state: item → pytree of `jax.ShapeDtypeStruct` with sharding, as the state to be returned.
            partial: ignore items of the checkpoint that `abstract_state` lacks. Within an item, all must agree.

        Returns:
            The state, bit for bit as saved, and `data_state`.

        Raises:
            CheckpointError: no such step, or the first array that differs in name, shape or dtype.
        """
        path = self.directory / str(step)
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.directory}: no checkpoint of step {step}; complete checkpoints: {known}")
        metadata = v1.checkpointables_metadata(path)
        saved = {item: tree for item, tree in metadata.metadata.items() if item in abstract_state or not partial}
        _check_same(path, _specs(saved), _specs(abstract_state))
        wanted = {item: _nested(tree) for item, tree in abstract_state.items()}
        wanted = {item: tree for item, tree in wanted.items() if tree}
        loaded = v1.load_checkpointables(path, wanted) if wanted else {}
        state = {item: _like(tree, loaded.get(item, {})) for item, tree in abstract_state.items()}
        return state, metadata.custom_metadata["data_state"]  # pyright: ignore[reportOptionalSubscript]

    def wait(self) -> None:
        """Return when a save under way is complete.

        Raises:
            CheckpointError: it failed; nothing of it counts as a checkpoint.
        """
        if self._writer:
            with self._failures():
                self._writer.wait()

    def close(self) -> None:
        """Complete a save under way and ends Orbax's threads."""
        if self._writer:
            with self._failures():
                self._writer.close()
            self._writer = None

    def __enter__(self) -> "Checkpoints":
        """Return the checkpoints themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Complete a save under way."""
        self.close()

    def _checkpointer(self) -> v1.training.Checkpointer:
        """Orbax's writer, made at the first save: making it clears what interrupted saves left behind."""
        if self._writer is None:
            self._writer = v1.training.Checkpointer(
                self.directory,
                preservation_policy=v1.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        return self._writer

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its storage, its threads and its checks raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            advice = "check free space and permissions"
            raise CheckpointError(f"{self.directory}: saving failed: {reason}; {advice}") from error


def save_config(workdir: str | os.PathLike, config: config_lib.Config) -> None:
    """Write WORKDIR/config.json, all or nothing; makes the directory if missing."""
    path = pathlib.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("config.json.tmp")
    temporary.write_text(json.dumps(config_lib.to_dict(config), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_config(workdir: str | os.PathLike) -> config_lib.Config:
    """Read the configuration of the run in WORKDIR.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: it is not JSON, or holds an unknown or forbidden field.
    """
    path = pathlib.Path(workdir) / "config.json"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; --workdir must be the directory of a run started with train.py")
    try:
        return config_lib.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # ConfigError is one
        raise config_lib.ConfigError(f"{path}: {error}") from None


def _by_name(tree: Any) -> dict[Names, Any]:
    """Map the names on the way to a leaf to the leaf, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(map(_name, path)) or ("value",): leaf for path, leaf in leaves}


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _nested(tree: Any) -> dict[str, Any]:
    """Turn a tree into nested dictionaries, so that the files do not depend on Python classes; {} without leaves."""
    out: dict[str, Any] = {}
    for names, leaf in _by_name(tree).items():
        inner = out
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = leaf
    return out


def _like(tree: Any, nested: dict[str, Any]) -> Any:
    """Put the leaves of nested dictionaries into the structure of `tree`: the inverse of `_nested`."""
    leaves = _by_name(nested)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[names] for names in _by_name(tree)])


def _specs(state: State) -> dict[str, str]:
    """Describe each array as it is on disk, such as '(4, 8) float32', by its full name."""
    arrays = {(item, *names): leaf for item, tree in state.items() for names, leaf in _by_name(tree).items()}
    return {"/".join(names): _spec(leaf) for names, leaf in arrays.items()}


def _spec(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # how Orbax stores keys
    return f"{tuple(leaf.shape)} {leaf.dtype}"


def _check_same(path: pathlib.Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Raise CheckpointError at the first array that differs, in the expected order, then in the saved one."""
    name = next((name for name in (*expected, *saved) if expected.get(name) != saved.get(name)), None)
    if name is None:
        return
    close = difflib.get_close_matches(name, saved, n=1) if name not in saved else []
    there = saved.get(name, "absent") + (f" (nearest: {close[0]})" if close else "")
    raise CheckpointError(
        f"{path}: {name} is {there} in the checkpoint, {expected.get(name, 'absent')} in this run; "
        "use the configuration that saved it (config.json of its run), or a new --workdir"
    )
