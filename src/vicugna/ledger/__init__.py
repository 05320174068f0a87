"""Every attempt of a workspace, entered before it begins and closed with outcome and cost."""

from vicugna.ledger.attempts import code_version, recorded
from vicugna.ledger.ledger import Attempt, Ledger, attempts_in, intact, lineage

__all__ = ["Attempt", "Ledger", "attempts_in", "code_version", "intact", "lineage", "recorded"]
