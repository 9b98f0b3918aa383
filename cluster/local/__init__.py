"""The stages in one process, without Ray."""
