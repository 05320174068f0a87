"""The ledger of attempts, releases made from it, and their verification."""

from vicugna.release.contents import About
from vicugna.release.ledger import Attempt, Ledger, lineage
from vicugna.release.make import make_release
from vicugna.release.verify import Check, verify

__all__ = ["About", "Attempt", "Check", "Ledger", "lineage", "make_release", "verify"]
