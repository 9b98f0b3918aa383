"""Objectives: what an update minimises."""
