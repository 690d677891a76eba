"""Keeping a shared cache well: verify, collect garbage, compact, pin."""

from .collect import GarbagePlan, GarbageReport, choose_names, choose_spaces, plan_gc, run_gc
from .compact import CompactReport, compact_space
from .pins import Pin, add_pin, read_pins, remove_pin
from .retire import Leaving, last_uses, remove_retired
from .verify import Finding, count_packs, name_source, repair, verify

__all__ = [
    "CompactReport",
    "Finding",
    "GarbagePlan",
    "GarbageReport",
    "Leaving",
    "Pin",
    "add_pin",
    "choose_names",
    "choose_spaces",
    "compact_space",
    "count_packs",
    "last_uses",
    "name_source",
    "plan_gc",
    "read_pins",
    "remove_pin",
    "remove_retired",
    "repair",
    "run_gc",
    "verify",
]
