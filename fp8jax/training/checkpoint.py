"""Save and restore checkpoints of a run, under WORKDIR/checkpoints, and its configuration,
WORKDIR/config.json.

    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(20, {"params": params, "opt_state": opt_state}, data_state={"step": 20})   # in the background
        step = checkpoints.latest_step()                                                            # or None
        state, data_state = checkpoints.restore(step, abstract_state)

`abstract_state` has the structure of the state, with a `jax.ShapeDtypeStruct` (shape, dtype,
sharding) for each array. The sharding may be of another mesh or another number of devices than the
one that saved.

A state is a dictionary of pytrees of arrays. Each of its entries is an *item* that can be restored
without the others (`partial=True`): evaluation does not read the optimizer. On disk an item is a
nested dictionary of arrays by name, for any containers, so Orbax alone can read it too; tuples,
dataclasses and empty containers come back from `abstract_state`.

Other modules decide when to save, and what belongs to a state.
"""

import difflib
import functools
import json
import logging
import math
import os
import pathlib
import shutil
import threading
from typing import Any

import jax
from absl import logging as absl_logging
from orbax.checkpoint import v1

from fp8jax import config as config_lib
from fp8jax.config import CheckpointError
from fp8jax.data import run_tokenizer
from fp8jax.parallel.distributed import from_any, from_first
from fp8jax.training import manifest

# An unfinished save has another name than a checkpoint, so every checkpoint is complete.
_SAVING, _DELETING = "saving-", "deleting-"
State = dict[str, Any]  # item → pytree
Names = tuple[str, ...]

# Orbax logs some 70 lines per save at INFO, absl's level in any program under absl.app, and as many
# stacks at ERROR if one save fails, which an exception reports as well.
_ORBAX = os.path.join("orbax", "checkpoint")


@functools.cache
def _quieten_orbax() -> None:
    absl_logging.get_absl_logger().addFilter(
        lambda line: line.levelno == logging.WARNING or _ORBAX not in line.pathname
    )


class Checkpoints:
    """The checkpoints of a run; only `save` and `set_aside` write, so other processes may read.

    Args:
        workdir: directory of the run.
        keep: newest checkpoints that stay, at least 1; older ones are deleted once a newer one is
            complete.
        keep_every: checkpoints of steps that this divides stay too; 0 for none.
        keep_best: this many checkpoints of the lowest held-out loss stay too.
        facts: facts about the run for the manifest of each checkpoint.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int = 1,
        keep_every: int = 0,
        keep_best: int = 0,
        facts: dict[str, Any] | None = None,
    ):
        _quieten_orbax()
        # Orbax takes absolute paths only.
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep, self._keep_every, self._keep_best, self._facts = (
            keep,
            keep_every,
            keep_best,
            facts or {},
        )
        self._saving: threading.Thread | None = None
        self._failure: str | None = None
        self._cleaned = False

    def steps(self) -> list[int]:
        """Return the steps of all complete checkpoints on disk, ascending; `newest` also checks for
        damage.
        """
        return manifest.steps(self.directory)

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, None if there is none."""
        return max(self.steps(), default=None)

    def chosen(self, step: int | None) -> int:
        """Return the step, or that of the newest complete checkpoint for None; the same on every
        process.

        Raises:
            CheckpointError: there is none, or none of this step; the message lists the existing
                ones.
        """
        steps = self.steps()
        found = from_first(
            max(steps, default=-1) if step is None else step if step in steps else -1
        )
        if found >= 0:
            return found
        raise manifest.missing(self.directory, step, steps)

    def newest(self) -> tuple[int | None, dict[int, str]]:
        """Return the newest step whose files are intact, or None; and newer ones that are skipped,
        with reasons.

        Every process must call this: each reads its share of the files, and all get the same
        answer.
        """
        passed: dict[int, str] = {}
        paths = self.directory.iterdir() if self.directory.is_dir() else ()
        steps = sorted((int(path.name) for path in paths if path.name.isdecimal()), reverse=True)
        while True:
            step = from_first(next((step for step in steps if step not in passed), -1))
            if step < 0:
                return None, passed
            if (reason := self._problem(step)) is None:
                return step, passed
            passed[step] = reason

    def _problem(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint's files; each process reads its share of them."""
        return from_any(
            manifest.problem(self.directory / str(step), (jax.process_index(), jax.process_count()))
        )

    def set_aside(self, step: int) -> pathlib.Path:
        """Rename a damaged checkpoint, so that its step can be saved again; nothing is deleted."""
        to = self.directory / f"damaged-{step}"
        for attempt in range(2, 1000):
            if not to.exists():
                break
            to = self.directory / f"damaged-{step}-{attempt}"
        os.rename(self.directory / str(step), to)
        return to

    def _clean(self) -> None:
        """Remove, once before the first save, what interrupted saves and deletions left behind."""
        if not self._cleaned and self.directory.is_dir() and jax.process_index() == 0:
            for path in self.directory.iterdir():
                if path.name.startswith((_SAVING, _DELETING)):
                    shutil.rmtree(path, ignore_errors=True)
        self._cleaned = True

    def save(
        self,
        step: int,
        state: State,
        data_state: dict[str, Any],
        *,
        held_out_loss: float | None = None,
    ) -> None:
        """Start saving; files are written in the background and get their final name when complete.

        The call returns when the arrays are copied, so the next step may take their memory
        (donation). An earlier save that is still running is finished first: see `busy`. A step that
        is already saved is not saved again.

        Args:
            step: steps taken so far.
            state: item → pytree of jax arrays, of any dtype, PRNG keys included.
            data_state: the position in the data, as JSON values.
            held_out_loss: held-out loss of this state, if known, for `keep_best`.

        Raises:
            CheckpointError: this save cannot begin, or the earlier one failed.
        """
        self.wait()
        self._clean()
        if from_first(step in self.steps()):
            return
        items = {item: _nested(tree) for item, tree in state.items()}
        # A training loop may forbid implicit transfers to the host; a save must copy the state
        # there.
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with jax.transfer_guard("allow"):
                response = v1.save_checkpointables_async(
                    str(self.directory / f"{_SAVING}{step}"),
                    {
                        item: tree for item, tree in items.items() if tree
                    },  # Orbax refuses an empty item
                    overwrite=True,  # replaces an earlier try that failed
                    custom_metadata={"data_state": data_state},
                )
        except Exception as error:  # Orbax's storage, threads and checks raise many kinds
            raise CheckpointError(self._why(error)) from error
        facts = {"step": step, **self._facts} | (
            {} if held_out_loss is None else {"held_out_loss": held_out_loss}
        )
        self._saving = threading.Thread(
            target=self._finish, args=(step, response, facts), name="checkpoint"
        )
        self._saving.start()

    def busy(self) -> bool:
        """Return whether a save is running, for which another would have to wait."""
        return self._saving is not None and self._saving.is_alive()

    def failure(self) -> str | None:
        """Return once why the last save failed, if it has ended and failed; never wait."""
        failure, self._failure = (None, self._failure) if self.busy() else (self._failure, None)
        return failure

    def _finish(self, step: int, response: Any, facts: dict[str, Any]) -> None:
        """Wait in the background for the files, seal them with a manifest, and remove checkpoints
        that need not be kept.
        """
        try:
            response.result()
            if jax.process_index() == 0:
                path = self.directory / f"{_SAVING}{step}"
                manifest.write(path, facts)
                os.rename(path, self.directory / str(step))
                manifest.sync(self.directory)  # before an older one is deleted
                self._prune()
        except Exception as error:
            self._failure = self._why(error)

    def _prune(self) -> None:
        steps = self.steps()
        kept = {
            *steps[-self._keep :],
            *(step for step in steps if self._keep_every and step % self._keep_every == 0),
            *self._best(steps),
        }
        for step in steps:
            if step not in kept:
                # Half deleted under its own name, it would look damaged.
                going = self.directory / f"{_DELETING}{step}"
                os.rename(self.directory / str(step), going)
                shutil.rmtree(going)

    def _best(self, steps: list[int]) -> list[int]:
        """Return the steps of the lowest held-out losses, as many as stay."""
        losses = (
            {step: manifest.fact(self.directory / str(step), "held_out_loss") for step in steps}
            if self._keep_best
            else {}
        )
        known = [
            (loss, step)
            for step, loss in losses.items()
            if isinstance(loss, float) and math.isfinite(loss)
        ]
        return [step for _, step in sorted(known)[: self._keep_best]]

    def _why(self, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = (
            reason if len(reason) < 300 else f"{reason[:100]} … {reason[-150:]}"
        )  # TensorStore ends with the system's own words
        return f"{self.directory}: saving failed: {reason}; check free space and permissions"

    def dtypes(self, step: int) -> dict[str, str]:
        """Return the dtype of every array of a checkpoint, by full name, as 'params/embedding/w'."""
        metadata = _metadata(self.directory / str(step))
        return {name: spec.rpartition(" ")[2] for name, spec in _specs(metadata.metadata).items()}

    def data_state(self, step: int) -> dict[str, Any]:
        """Return the `data_state` of a checkpoint, without reading arrays."""
        return _metadata(self.directory / str(step)).custom_metadata["data_state"]

    def abstract_item(self, step: int, item: str, sharding: Any) -> Any:
        """Return an item as it was saved, nested dictionaries of jax.ShapeDtypeStruct; empty if the
        checkpoint lacks it.
        """
        saved = _metadata(self.directory / str(step)).metadata.get(item, {})
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), saved
        )

    def restore(
        self, step: int, abstract_state: State, *, partial: bool = False, verify: bool = True
    ) -> tuple[State, dict[str, Any]]:
        """Read a checkpoint.

        Args:
            step: one of `steps()`.
            abstract_state: item → pytree of `jax.ShapeDtypeStruct` with sharding, as the state to
                be returned.
            partial: ignore items of the checkpoint that `abstract_state` lacks. Within an item, all
                must agree.
            verify: first read every file, each process its share, and compare it with the manifest;
                unnecessary for the step that `newest` found.

        Returns:
            The state, bit for bit as saved, and `data_state`.

        Raises:
            CheckpointError: the step does not exist, a file is damaged, or an array differs in
                name, shape or dtype.
        """
        path = self.directory / str(step)
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"{self.directory}: no checkpoint of step {step}; complete checkpoints: {known}"
            )
        if verify and (reason := self._problem(step)):
            raise CheckpointError(
                f"{path}: {reason}; the checkpoint cannot be trusted, use another step"
            )
        metadata = _metadata(path)
        saved = {
            item: tree
            for item, tree in metadata.metadata.items()
            if item in abstract_state or not partial
        }
        _check_same(path, _specs(saved), _specs(abstract_state))
        wanted = {item: _nested(tree) for item, tree in abstract_state.items()}
        wanted = {item: tree for item, tree in wanted.items() if tree}
        loaded = v1.load_checkpointables(str(path), wanted) if wanted else {}
        state = {item: _like(tree, loaded.get(item, {})) for item, tree in abstract_state.items()}
        return state, metadata.custom_metadata["data_state"]

    def wait(self) -> None:
        """Wait until a running save is complete.

        Raises:
            CheckpointError: it failed, and left no checkpoint.
        """
        if self._saving:
            self._saving.join()
            self._saving = None
        if failure := self.failure():
            raise CheckpointError(failure)

    def close(self) -> None:
        """Complete a running save."""
        self.wait()

    def __enter__(self) -> "Checkpoints":
        """Return the checkpoints themselves."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Complete a running save."""
        self.close()


def save_config(workdir: str | os.PathLike, config: config_lib.Config) -> None:
    """Write WORKDIR/config.json atomically, creating the directory if missing."""
    path = pathlib.Path(workdir) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name("config.json.tmp")
    values = run_tokenizer.as_written(config, workdir)
    temporary.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load_config(workdir: str | os.PathLike) -> config_lib.Config:
    """Read the configuration of the run in WORKDIR.

    Raises:
        CheckpointError: there is no config.json.
        ConfigError: it is not JSON, or holds an unknown or forbidden field.
    """
    try:
        return run_tokenizer.read_config(workdir)
    except FileNotFoundError:
        path = pathlib.Path(workdir) / "config.json"
        raise CheckpointError(
            f"{path}: no such file; --workdir must be the directory of a run started with train.py"
        ) from None


def _by_name(tree: Any) -> dict[Names, Any]:
    """Map the names on the path to a leaf to the leaf, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {tuple(map(_name, path)) or ("value",): leaf for path, leaf in leaves}


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _nested(tree: Any) -> dict[str, Any]:
    """Turn a tree into nested dictionaries, so that files do not depend on Python classes; {}
    without leaves.
    """
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


def _metadata(path: pathlib.Path) -> Any:
    """Return Orbax's metadata of a checkpoint: `metadata` by item, and `custom_metadata`."""
    return v1.checkpointables_metadata(str(path))


def _specs(state: State) -> dict[str, str]:
    """Describe each array as it is on disk, such as '(4, 8) float32', by its full name."""
    arrays = {
        (item, *names): leaf
        for item, tree in state.items()
        for names, leaf in _by_name(tree).items()
    }
    return {"/".join(names): _spec(leaf) for names, leaf in arrays.items()}


def _spec(leaf: Any) -> str:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # Orbax stores keys so
    return f"{tuple(leaf.shape)} {leaf.dtype}"


def _check_same(path: pathlib.Path, saved: dict[str, str], expected: dict[str, str]) -> None:
    """Raise CheckpointError at the first array that differs, in the expected order, then in the
    saved one.
    """
    name = next(
        (name for name in (*expected, *saved) if expected.get(name) != saved.get(name)), None
    )
    if name is None:
        return
    close = difflib.get_close_matches(name, saved, n=1) if name not in saved else []
    there = saved.get(name, "absent") + (f" (nearest: {close[0]})" if close else "")
    raise CheckpointError(
        f"{path}: {name} is {there} in the checkpoint, {expected.get(name, 'absent')} in this run; "
        "use the configuration that saved it (config.json of its run), or a new --workdir"
    )
