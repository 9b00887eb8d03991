"""Policies in closed loop, frames imagined from true actions, what came of both, and the pages that show it."""
