"""The command line: ``python -m layeredrl_trl train`` and ``... evaluate``."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from dataclasses import replace
from typing import Annotated

try:
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401
    import tyro
except ImportError as error:
    print(
        f"error: {error}. The command line needs: pip install 'layeredrl_trl[demo]'",
        file=sys.stderr,
    )
    sys.exit(2)


import torch
import torchrl

from layeredrl_trl.recipes import (
    EvaluateConfig,
    RecipeError,
    TrainConfig,
    episode_returns,
    make_env,
    run_episodes,
    train,
)
from layeredrl_trl.recipes.agent import Spaces, make_predictor
from layeredrl_trl.recipes.errors import describe, one_line
from layeredrl_trl.recipes.memory import check_memory
from layeredrl_trl.recipes.run_folder import RunFolder

_PROGRAM = "python -m layeredrl_trl"
_UNFORESEEN = "Nobody foresaw this: please report it (LAYEREDRL_TRL_TRACEBACK=1 shows all of it)."

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
)


def evaluate(config: EvaluateConfig) -> None:
    """Let a trained agent act and print its returns.

    Raises:
        RecipeError: if the run cannot be used, or its environment fails.
    """
    folder = RunFolder(config.run)
    saved = folder.latest()
    trained = folder.read_config(saved, device=config.device, env=config.env)
    trained = replace(trained, eval_episodes=config.episodes)
    env = make_env(trained.env)
    spaces = Spaces.of(env)
    env.close()
    check_memory(trained, spaces)
    predictor = make_predictor(trained, spaces)
    folder.load_predictor(predictor, saved)
    try:
        rollout = run_episodes(trained, predictor, episodes=config.episodes, seed=config.seed)
    except Exception as error:
        raise RecipeError(f"an evaluation episode failed: {describe(error)}.") from error
    returns = episode_returns(rollout)
    for i, value in enumerate(returns.tolist()):
        print(f"episode {i + 1:3d}: return {value:.1f}")
    print(f"{trained.env}: mean return {returns.mean():.1f} of {config.episodes} episodes")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 for an error, 130 for Ctrl-C.

    Every error is one line on stderr; with the environment variable ``LAYEREDRL_TRL_TRACEBACK``
    set, its traceback comes before it.
    """
    torchrl.logger.setLevel("WARNING")
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names need not be of the locale
    excepthook = threading.excepthook
    # An error in the thread that writes for TensorBoard comes again in the main thread.
    threading.excepthook = lambda _: None
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("LAYEREDRL_TRL_TRACEBACK"):
            traceback.print_exc()
        foreseen = isinstance(error, RecipeError | OSError)
        text = str(error) if foreseen else f"{describe(error)}. {_UNFORESEEN}"
        print(f"error: {one_line(text)}", file=sys.stderr)
        _drop_unwritable_output()
        return 2
    finally:
        threading.excepthook = excepthook


def _run(arguments: list[str]) -> int:
    config = _parse(arguments)
    torch.set_num_threads(config.num_threads)
    # Clusters end a job by SIGTERM, which is handled like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(config, EvaluateConfig):
        evaluate(config)
        return 0
    return 130 if train(config, given=_names(arguments)).interrupted else 0


def _parse(arguments: list[str]) -> TrainConfig | EvaluateConfig:
    """Make the options of a command from its arguments.

    Raises:
        RecipeError: if they are wrong, with what tyro prints about it in a box of several lines.
        SystemExit: after the help was printed.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Command, args=arguments, prog=_PROGRAM, description=__doc__)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        cause: BaseException | None = exit_
        while cause is not None:
            if isinstance(cause, RecipeError):
                raise cause from None
            cause = cause.__context__
        raise RecipeError(_in_the_box(printed.getvalue())) from None


def _in_the_box(text: str) -> str:
    """Take the message out of the box that tyro draws, without its title and its general advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
    lines = [re.sub(r"^[│|] ?(.*?) *[│|]?$", r"\1", line) for line in text.splitlines()[1:]]
    parts = re.split(r"^\s*[-─+╰╯]{3,}\s*$", "\n".join(lines), flags=re.MULTILINE)
    advice = ("Argument helptext", "For full helptext")
    parts = [part for part in map(str.strip, parts) if part and not part.startswith(advice)]
    message = one_line("; ".join(parts)).removeprefix("Error parsing ").rstrip(".")
    return f"{message or 'the arguments are wrong'}; see `{_PROGRAM} --help`."


def _names(arguments: list[str]) -> set[str]:
    """Return the names of the options among the arguments."""
    options = (word[2:].split("=")[0] for word in arguments if word.startswith("--"))
    return {option.replace("-", "_").removeprefix("no_") for option in options}


def _drop_unwritable_output() -> None:
    """Let Python end quietly where nobody reads its output any more, or its disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
