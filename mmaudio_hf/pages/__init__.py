"""HTML pages: the report of a run, the comparison of runs, the audit of media, the demo."""
