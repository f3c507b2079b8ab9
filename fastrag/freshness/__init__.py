"""Encode stored passages again while the passage encoder trains."""

from fastrag.freshness.policies import RefreshPolicy
from fastrag.freshness.refresher import IndexRefresher, Refresh

__all__ = ["IndexRefresher", "Refresh", "RefreshPolicy"]
