"""The command line of the DreamBooth script as one frozen configuration."""

from .dreambooth import DreamBoothConfig, parse

__all__ = ["DreamBoothConfig", "parse"]
