"""The main job, built from the public API: collect, learn, plan, evaluate.

It needs the extra ``demo`` (matplotlib, tqdm, tyro).
"""

from layeredrl_trl.recipes.config import EvaluateConfig, RecipeError, TrainConfig
from layeredrl_trl.recipes.environments import make_env
from layeredrl_trl.recipes.evaluation import episode_returns, run_episodes
from layeredrl_trl.recipes.training import Run, train

__all__ = [
    "EvaluateConfig",
    "RecipeError",
    "Run",
    "TrainConfig",
    "episode_returns",
    "make_env",
    "run_episodes",
    "train",
]
