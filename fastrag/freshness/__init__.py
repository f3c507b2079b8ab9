"""Encode stored passages again while the passage encoder trains."""

from fastrag.freshness.kinds import Drift, Every, Frozen, Map, Rolling
from fastrag.freshness.policies import RefreshPolicy, View
from fastrag.freshness.refresher import IndexRefresher, Refresh
from fastrag.freshness.staleness import Staleness

__all__ = [
    "Drift",
    "Every",
    "Frozen",
    "IndexRefresher",
    "Map",
    "Refresh",
    "RefreshPolicy",
    "Rolling",
    "Staleness",
    "View",
]
