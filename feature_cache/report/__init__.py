"""Pages of HTML that need nothing else, on a cache or an evaluation, and pictures of frames.

Nothing here computes an embedding or changes the cache.
"""

from .evaluation_page import render_evaluation
from .frame_pictures import Choice, FrameView, Strip, look_at
from .overview import Report, survey_cache
from .page import fit_palette, render_page
from .picture import compose_picture, draw_in_terminal

__all__ = [
    "Choice",
    "FrameView",
    "Report",
    "Strip",
    "compose_picture",
    "draw_in_terminal",
    "fit_palette",
    "look_at",
    "render_evaluation",
    "render_page",
    "survey_cache",
]
