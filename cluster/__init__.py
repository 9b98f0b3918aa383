"""Stage 4: the service around the stages; the only importer of Ray."""
