"""The search loop, its journal and run directory, the finals, and the summary of results.

Works with strategies and evaluations; never with tensors, engines or Ray.
"""

from evomerge.search import events
from evomerge.search.budget import Budget
from evomerge.search.finals import choose_finalists, in_finals, run_finals
from evomerge.search.front_files import FrontFiles, front_csv, front_json
from evomerge.search.item_store import ItemStore
from evomerge.search.journal import (
    FORMAT_VERSION,
    Journal,
    JournalReader,
    event,
    first_event,
    journal_events,
    read_journal,
)
from evomerge.search.loop import Baseline, Interrupted, Observer, SearchLoop, StopRequest, WorkerPool
from evomerge.search.ranking import (
    best_key,
    best_of_front,
    front_of,
    leader,
    members_of,
    pick,
    reference_losses,
    standing,
    utility,
)
from evomerge.search.recorder import RunRecorder, open_items, with_items
from evomerge.search.resolved import Resolved
from evomerge.search.run_directory import RunDirectory, writing_into
from evomerge.search.run_lock import HolderWatch, RunLock
from evomerge.search.state import RunState
from evomerge.search.summary import (
    Z_95,
    Comparison,
    Row,
    Summary,
    headline,
    indifferent,
    items_of_candidate,
    mean_with_error,
    overhead,
    remarks_on_finals,
    summarize,
    verdict,
)
from evomerge.search.tables import Entry

__all__ = [
    "FORMAT_VERSION",
    "Z_95",
    "Baseline",
    "Budget",
    "Comparison",
    "Entry",
    "FrontFiles",
    "HolderWatch",
    "Interrupted",
    "ItemStore",
    "Journal",
    "JournalReader",
    "Observer",
    "Resolved",
    "Row",
    "RunDirectory",
    "RunLock",
    "RunRecorder",
    "RunState",
    "SearchLoop",
    "StopRequest",
    "Summary",
    "WorkerPool",
    "best_key",
    "best_of_front",
    "choose_finalists",
    "event",
    "events",
    "first_event",
    "front_csv",
    "front_json",
    "front_of",
    "headline",
    "in_finals",
    "indifferent",
    "items_of_candidate",
    "journal_events",
    "leader",
    "mean_with_error",
    "members_of",
    "open_items",
    "overhead",
    "pick",
    "read_journal",
    "reference_losses",
    "remarks_on_finals",
    "run_finals",
    "standing",
    "summarize",
    "utility",
    "verdict",
    "with_items",
    "writing_into",
]
