"""Keeping a shared cache well: verify, collect garbage, compact, pin."""

from .collect import GarbagePlan, GarbageReport, choose_names, choose_spaces, plan_gc, run_gc
from .compact import CompactReport, compact_space, merge_behind, merge_packs
from .pins import Pin, add_pin, read_pins, remove_pin
from .uses_of_packs import last_uses
from .verify import Finding, count_packs, name_source, repair, verify

__all__ = [
    "CompactReport",
    "Finding",
    "GarbagePlan",
    "GarbageReport",
    "Pin",
    "add_pin",
    "choose_names",
    "choose_spaces",
    "compact_space",
    "count_packs",
    "last_uses",
    "merge_behind",
    "merge_packs",
    "name_source",
    "plan_gc",
    "read_pins",
    "remove_pin",
    "repair",
    "run_gc",
    "verify",
]
