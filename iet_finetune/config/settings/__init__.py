"""The settings of a run by group: frozen dataclasses whose fields are the flags and the keys of YAML files."""

from .checks import require as require
from .inputs import PRESETS as PRESETS
from .inputs import DataConfig as DataConfig
from .inputs import ModelConfig as ModelConfig
from .method import DEFAULT_MERGE_EPOCHS as DEFAULT_MERGE_EPOCHS
from .method import AdapterConfig as AdapterConfig
from .method import AGCConfig as AGCConfig
from .method import CalibratedConfig as CalibratedConfig
from .method import EnsembleConfig as EnsembleConfig
from .method import GuardConfig as GuardConfig
from .prior import PriorConfig as PriorConfig
from .results import AuditConfig as AuditConfig
from .results import CheckpointConfig as CheckpointConfig
from .results import HubConfig as HubConfig
from .results import LoggingConfig as LoggingConfig
from .results import ValidationConfig as ValidationConfig
from .training import SCHEDULES as SCHEDULES
from .training import OptimizerConfig as OptimizerConfig
from .training import TrainingConfig as TrainingConfig
