"""Scores with error bars, every planned item accounted for."""

from vicugna.evals.items import UserItems, plan_items
from vicugna.evals.plan import Plan, PlannedItem, build_plan
from vicugna.evals.results import Results, Row, read_records, read_results
from vicugna.evals.runner import run

__all__ = ["Plan", "PlannedItem", "Results", "Row", "UserItems", "build_plan", "plan_items",
           "read_records", "read_results", "run"]
