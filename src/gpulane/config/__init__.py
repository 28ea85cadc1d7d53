"""The settings: one frozen tree, parsed and checked once from YAML text. Pure: no file, socket or
environment is read here.
"""

from gpulane.config.arguments import gpus_from_arguments
from gpulane.config.parse import parse_settings
from gpulane.config.settings import (
    EngineSettings,
    GpuSettings,
    HoldSettings,
    KeySettings,
    LimitSettings,
    ProbeSettings,
    RetentionSettings,
    RetrySettings,
    SchedulingSettings,
    Settings,
)

__all__ = [
    "EngineSettings",
    "GpuSettings",
    "HoldSettings",
    "KeySettings",
    "LimitSettings",
    "ProbeSettings",
    "RetentionSettings",
    "RetrySettings",
    "SchedulingSettings",
    "Settings",
    "gpus_from_arguments",
    "parse_settings",
]
