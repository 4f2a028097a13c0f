"""Distilling a HuBERT into a supernet."""
