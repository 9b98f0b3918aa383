"""The service around the stages, and its commands; the only importer of Ray."""
