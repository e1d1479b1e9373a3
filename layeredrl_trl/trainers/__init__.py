"""Training by TorchRL's trainers.

``PredictorTrainer`` is one put together; its parts (the optimisation step, storing and sampling,
the state of the collector, logs) work in a trainer of your own, too. ``ImaginedBuffer`` gives any
off-policy trainer imagined data.
"""

from layeredrl_trl.trainers.collector_state import CollectorState
from layeredrl_trl.trainers.episode_log import EpisodeLog, PlannerLog
from layeredrl_trl.trainers.imagined_buffer import ImaginedBuffer
from layeredrl_trl.trainers.no_collector import NoCollector
from layeredrl_trl.trainers.own_state import OwnState
from layeredrl_trl.trainers.predictor_trainer import PredictorTrainer
from layeredrl_trl.trainers.slice_feed import SliceFeed
from layeredrl_trl.trainers.stepper import PredictorStepper

__all__ = [
    "CollectorState",
    "EpisodeLog",
    "ImaginedBuffer",
    "NoCollector",
    "OwnState",
    "PlannerLog",
    "PredictorStepper",
    "PredictorTrainer",
    "SliceFeed",
]
