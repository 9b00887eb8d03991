"""Long work that survives kills: a folder with a manifest, local worker processes, Ray."""
