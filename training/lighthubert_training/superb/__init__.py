"""Scores of frozen models on SUPERB's ten tasks."""
