"""The old place of `src.analysis.tools`."""

from src.analysis.tools import *  # noqa: F403
from src.utils.console import progress_display  # noqa: F401
