"""What leaves the house: an adapter or a pipeline that plain diffusers loads."""
