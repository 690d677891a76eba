"""Warming: a plan of what is missing, and a run of it, on this machine or on a Dask cluster."""

from ..engine import Failure
from ..movies import Source
from .local import run_warm
from .plan import DENSE, PlannedMovie, PlanRow, Task, Unit, WarmPlan, plan_warm
from .run_report import WarmReport
from .sources import find_sources, open_movies
from .stored_grids import StoredGrids
from .worker import Recipe

__all__ = [
    "DENSE",
    "Failure",
    "PlanRow",
    "PlannedMovie",
    "Recipe",
    "Source",
    "StoredGrids",
    "Task",
    "Unit",
    "WarmPlan",
    "WarmReport",
    "find_sources",
    "open_movies",
    "plan_warm",
    "run_warm",
]
