"""Releases made from a workspace's attempts, and their verification."""

from vicugna.release.contents import About
from vicugna.release.make import make_release
from vicugna.release.verify import Check, verify

__all__ = ["About", "Check", "make_release", "verify"]
