"""Experiments around the library: recipes that are run from a clone, never installed."""
