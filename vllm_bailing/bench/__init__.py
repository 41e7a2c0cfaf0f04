"""Timed comparisons of engines, each in fresh processes that take turns."""
