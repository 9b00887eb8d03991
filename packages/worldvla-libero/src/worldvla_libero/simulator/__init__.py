"""LIBERO's suites and tasks, evaluation protocols, and one environment: settle, look only when asked, step."""
