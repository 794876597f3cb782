"""The budget of a search, which decides when to stop asking."""

from dataclasses import dataclass

from evomerge.core import Json
from evomerge.search.state import RunState

MAX_FAILURES_IN_A_ROW = 30
"""This many failures in a row mean that something is broken, not that the candidates are bad."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of a search; None = no limit. Evaluations and items are those on the search split, baselines included; hours are the
    wall time of all sessions, finals included.

    All limits except `hours` depend only on asks and tells (for failures: since the run was last resumed), so a deterministic run always stops at
    the same candidate.
    """

    evaluations: int | None = None
    items: int | None = None
    hours: float | None = None

    def reasons_to_stop(self, state: RunState, elapsed_s: float) -> dict[str, Json]:
        """The reasons why no further candidate may be asked now; empty if one may be asked."""
        reasons: dict[str, Json] = {}
        if self.evaluations is not None and len(state.entries) >= self.evaluations:
            reasons["evaluations"] = self.evaluations
        if self.items is not None:
            # the first candidate shows how many items one takes; ask for no other before it is done
            unknown = state.items_each == 0 and bool(state.pending)
            if unknown or state.items_told + (len(state.pending) + 1) * state.items_each > self.items:
                reasons["items"] = self.items
        if self.hours is not None and elapsed_s >= self.hours * 3600:
            reasons["hours"] = self.hours
        if state.failed_in_a_row >= MAX_FAILURES_IN_A_ROW:
            reasons["failures"] = (
                f"{state.failed_in_a_row} candidates failed in a row; the last error: {state.last_error}"
            )
        return reasons
