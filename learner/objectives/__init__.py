"""Objectives of an update: the interface, the registry and the built-in ones."""
