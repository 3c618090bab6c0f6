"""Keeps pytest from importing the script that needs torch."""

collect_ignore = ["make_cases.py"]
