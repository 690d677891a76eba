"""A look at a cache: one page of HTML that needs nothing else, and pictures of single frames.

Nothing here computes an embedding or changes the cache.
"""

from .page import fit_palette, render_page
from .picture import compose_picture, draw_in_terminal
from .strip import Choice, FrameView, Strip, look_at
from .survey import Report, survey_cache

__all__ = [
    "Choice",
    "FrameView",
    "Report",
    "Strip",
    "compose_picture",
    "draw_in_terminal",
    "fit_palette",
    "look_at",
    "render_page",
    "survey_cache",
]
