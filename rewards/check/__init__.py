"""The check of a configuration's rewards before a run."""
