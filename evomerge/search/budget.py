"""When a search has to stop asking."""

from dataclasses import dataclass

from evomerge.core import Json
from evomerge.search.state import RunState

MAX_FAILURES_IN_A_ROW = 30
"""So many evaluations that fail one after the other mean that something is broken, not that the candidates are bad."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the search split; None = no limit. Baselines count.

    All but `hours` depend only on what was asked and told (failures: since the run was resumed last), so a deterministic run stops at the
    same candidate every time.
    """

    evaluations: int | None = None
    items: int | None = None
    hours: float | None = None

    def reasons_to_stop(self, state: RunState, elapsed_s: float) -> dict[str, Json]:
        """Why no further candidate may be asked now; empty: there is room for one more."""
        reasons: dict[str, Json] = {}
        if self.evaluations is not None and len(state.entries) >= self.evaluations:
            reasons["evaluations"] = self.evaluations
        if self.items is not None:
            unknown = state.items_each == 0 and bool(state.pending)  # what a candidate takes, the first one says
            if unknown or state.items_told + (len(state.pending) + 1) * state.items_each > self.items:
                reasons["items"] = self.items
        if self.hours is not None and elapsed_s >= self.hours * 3600:
            reasons["hours"] = self.hours
        if state.failed_in_a_row >= MAX_FAILURES_IN_A_ROW:
            reasons["failures"] = (
                f"{state.failed_in_a_row} candidates failed one after the other; the last: {state.last_error}"
            )
        return reasons
