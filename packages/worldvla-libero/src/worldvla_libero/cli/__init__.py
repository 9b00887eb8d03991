"""The command `worldvla`: a file for each group of commands, and `main`, which puts them together."""
