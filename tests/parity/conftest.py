"""Keeps pytest from importing the scripts that need torch."""

collect_ignore = ["edge_cases.py", "make_aggregator_cases.py", "make_cases.py"]
