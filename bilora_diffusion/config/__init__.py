"""The command lines of the training scripts as frozen configurations."""

from ..image.options import DreamBoothConfig, parse
from ..text.options import TextConfig, parse_text

__all__ = ["DreamBoothConfig", "TextConfig", "parse", "parse_text"]
