"""Grids: which numbers can be written down. Nothing else knows how a number is represented."""
