"""Placeholder docstring while the workspace is being laid out."""
