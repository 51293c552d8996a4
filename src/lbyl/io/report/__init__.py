"""The report: its content, and how it is shown."""
