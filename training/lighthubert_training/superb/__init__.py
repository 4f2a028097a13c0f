"""SUPERB's ten tasks on frozen models."""
