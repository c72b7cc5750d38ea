"""Report at the end of a run where all is, and what to type next."""

import pathlib
import shlex


def what_next(
    workdir: pathlib.Path, step: int, *, report: bool, held_out: bool = True
) -> list[str]:
    """Return the last lines of a run that has finished.

    Args:
        workdir: directory of the run.
        step: its last step.
        report: whether the run wrote WORKDIR/report.html.
        held_out: whether it has text to evaluate on.
    """
    name = shlex.quote(str(workdir))
    lines = [f"finished step {step}; checkpoint {workdir / 'checkpoints' / str(step)}"]
    lines += [f"report   {workdir / 'report.html'}"] if report else []
    evaluate = f"next     python eval.py --workdir={name}" + ("" if held_out else " --held_out=DIR")
    return lines + [
        evaluate,
        f"         python -m fp8jax sample --workdir={name} --prompt='Anne Elliot'",
        f"         to train on: the same command with --config.training.steps={2 * step}",
    ]


def how_to_go_on(workdir: pathlib.Path, step: int, steps: int) -> str:
    """Return the line for a run that is started again although it has all its steps."""
    return (
        f"finished already: the run in {workdir} is at step {step} of {steps}; to train on say "
        f"--config.training.steps={2 * step}, "
        "to train anew choose another --workdir"
    )
