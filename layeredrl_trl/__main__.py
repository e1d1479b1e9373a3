"""The command line: ``python -m layeredrl_trl train`` and ``... evaluate``."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

try:
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401
    import tyro
except ImportError as error:
    sys.exit(f"error: {error}. The command line needs: pip install 'layeredrl_trl[demo]'")


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
from layeredrl_trl.recipes.agent import make_predictor
from layeredrl_trl.recipes.checkpoint import Checkpoint, restore

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
)


def evaluate(config: EvaluateConfig) -> None:
    """Let a trained agent act and print its returns.

    Raises:
        RecipeError: if the checkpoint cannot be used.
    """
    checkpoint = Checkpoint.load(config.checkpoint, config.device)
    trained = checkpoint.config
    predictor = make_predictor(trained, make_env(trained.env))
    restore(predictor, checkpoint.predictor, config.checkpoint)
    rollout = run_episodes(trained, predictor, episodes=config.episodes, seed=config.seed)
    returns = episode_returns(rollout)
    for i, value in enumerate(returns.tolist()):
        print(f"episode {i + 1:3d}: return {value:.1f}")
    print(f"{trained.env}: mean return {returns.mean():.1f} of {config.episodes} episodes")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 0, 2 for an error, 130 for Ctrl-C."""
    torchrl.logger.setLevel("WARNING")
    try:
        config = tyro.cli(
            Command, args=arguments, prog="python -m layeredrl_trl", description=__doc__
        )
        torch.set_num_threads(config.num_threads)
        # Clusters end a job by SIGTERM, which is handled like Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if isinstance(config, EvaluateConfig):
            evaluate(config)
            return 0
        return 130 if train(config).interrupted else 0
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
