"""The world model against recorded trajectories: clips of them, metrics, and the record."""
