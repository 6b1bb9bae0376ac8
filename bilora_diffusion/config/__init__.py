"""The command lines of the training scripts as frozen configurations."""

from .dreambooth import DreamBoothConfig, parse
from .text import TextConfig, parse_text

__all__ = ["DreamBoothConfig", "TextConfig", "parse", "parse_text"]
