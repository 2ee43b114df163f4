"""Shipped with the package, so that plug-ins can be held to the same contracts as our own parts."""
