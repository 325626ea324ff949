"""Families of host models: one adapter for the common structure, one file for each family that needs more."""
