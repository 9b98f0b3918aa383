"""The export of a checkpoint as an adapter or a pipeline that plain diffusers loads."""
